"""How fast a machine trains."""
