"""The small trained model that ships in the wheel, and the problems it was trained on and is judged by.

This folder is a checkpoint in the Hugging Face layout: ``config.json``, ``generation_config.json``,
``tokenizer.json`` and ``model.safetensors``.
"""
