"""The model card template, installed as `lambda_vit_hf.model_cards`."""
