"""From where a robot is to where it should be: actions that bring the imagined picture closest to a goal's."""
