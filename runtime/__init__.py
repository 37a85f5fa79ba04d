"""What every process shares: ids, errors, messages, bus, RPC, membership, configuration, lifecycle. No torch here."""
