"""BaFT inside other tools: EasyEdit and the LM evaluation harness."""
