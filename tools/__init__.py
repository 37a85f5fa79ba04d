"""The command line, and the chores around it. Talks to daemons over the bus; imports only the runtime."""
