"""Run directories: claiming, recording, resuming and reading one."""
