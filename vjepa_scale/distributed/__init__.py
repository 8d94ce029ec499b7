"""Processes, device mesh, and the engine that makes plain networks sharded ones."""
