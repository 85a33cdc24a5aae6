"""The lowest floor: devices, processes, storage, progress, errors. It knows no model."""
