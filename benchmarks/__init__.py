"""Scripts that produce every figure quoted about speed and memory."""
