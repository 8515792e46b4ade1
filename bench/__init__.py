"""What it costs: cases as data, a runner that refuses wrong results, and judges of the numbers."""
