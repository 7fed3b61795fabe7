"""What a process asks of its machine: files, locks, signals, devices, memory, launchers, the screen."""
