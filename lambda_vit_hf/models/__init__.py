"""What a LambdaViT is and computes. Flat, and self-contained: these files travel with every saved model."""
