"""The command lines: ``python tools/NAME.py`` in a checkout, console commands ``vjepa-…`` wherever it is installed."""
