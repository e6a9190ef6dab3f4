"""From a prompt to text states: the rules for prompts, Gemma-2, and the encoder made of both."""
