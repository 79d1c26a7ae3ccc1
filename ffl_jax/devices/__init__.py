"""Where programs run: devices, processes, signals. Light on imports."""
