"""The machine and the process; nothing here knows of learning."""
