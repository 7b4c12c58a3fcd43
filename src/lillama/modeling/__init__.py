"""The modules that compressed models are made of; they import torch and transformers alone, so that they ship with models."""
