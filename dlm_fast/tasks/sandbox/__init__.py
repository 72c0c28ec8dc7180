"""The sandbox: hostile programs run in child processes, verdicts are made outside of them."""
