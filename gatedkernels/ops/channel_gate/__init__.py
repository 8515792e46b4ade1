"""The gates of a layer at inference: pooling, two small layers, the decision, and the lists that it makes."""
