"""BaFT in pyreft and pyvene: the intervention type, a trainer, a data module and checkpoints. Needs pyreft."""
