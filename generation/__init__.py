"""From a model to text: decoding, sampling, quantized weights."""
