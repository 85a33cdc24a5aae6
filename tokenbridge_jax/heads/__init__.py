"""Channel heads: what predicts one position's C indices from the backbone's feature."""
