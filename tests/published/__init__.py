"""Our networks and training steps beside the published code's, whose results are kept here as small files.

``make.py`` says what the files hold and which command made them.
"""
