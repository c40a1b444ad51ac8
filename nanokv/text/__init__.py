"""Text and token ids: tokenizer, chat templates, sampling, detokenising. No cache may enter."""
