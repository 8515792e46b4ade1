"""The ragged convolution in Triton, which the backend "triton" of every operation is composed of."""
