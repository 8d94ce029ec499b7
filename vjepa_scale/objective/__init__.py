"""What a stage learns: networks, loss, and what it reports."""
