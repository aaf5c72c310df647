"""The steps from a conversation to the model's inputs: content, chat, tokenizing, inputs."""
