"""The Latents tab of TensorBoard: a trained model's latent space, turned by hand."""
