"""What every room needs: the user error, keyed randomness, atomic files, the rank environment."""
