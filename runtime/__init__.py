"""The front of house and the brain: HTTP, planning, the fleet."""
