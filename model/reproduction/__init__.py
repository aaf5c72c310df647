"""A LLaVA-ST trained from nothing on moving shapes. See docs/reproduction.md."""
