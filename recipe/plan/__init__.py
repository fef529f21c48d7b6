"""What follows from the settings: the division of an update, schedules, memory, time. Imports no torch."""
