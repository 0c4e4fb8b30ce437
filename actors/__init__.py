"""Ray actors, their calls and their life: the RPC runtime on top of the transport. See docs/architecture.md."""
