"""From a composed config to what it means; a DictConfig goes no further than here and the commands."""
