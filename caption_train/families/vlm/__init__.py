"""Any image-text-to-text model of transformers: Qwen-VL, JoyCaption, Gemma, SmolVLM and their like."""
