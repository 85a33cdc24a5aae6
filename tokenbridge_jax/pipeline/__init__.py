"""The trained line as one object, and what it does with pictures."""
