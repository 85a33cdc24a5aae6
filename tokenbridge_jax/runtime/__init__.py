"""The lowest layer: devices, processes, storage, progress, errors. It knows no model."""
