"""Training: objectives, the loop, and the recipes of the models in the box. Needs the extra ``train``."""
