"""Looking after a run: who runs it, what became of it, its lines as they come, its end on purpose. Without torch."""
