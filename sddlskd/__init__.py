"""Knowledge distillation by scale (SDD) with standardised logits (LSKD): from one command to the paper's table."""
