"""What everything stands on: devices, processes, storage, progress, errors. Knows no model."""
