"""Looking at edits: why one acts on a prompt, the paper's figures, and what a linear update cannot do."""
