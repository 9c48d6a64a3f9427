"""The mathematics: noise, who may attend to whom, and the loss. Pure functions on tensors."""
