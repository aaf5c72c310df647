"""LLaVA-ST itself, a thin consumer of llava_st_ops. Installed under the import name `llava_st`."""
