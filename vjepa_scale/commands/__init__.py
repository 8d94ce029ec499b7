"""The command lines: ``python tools/NAME.py`` in a checkout, console commands ``vjepa-…`` where it is installed."""
