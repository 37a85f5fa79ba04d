"""What every process shares: ids, errors, messages, the bus, RPC, membership, configuration, lifecycle. No torch here."""
