"""An adapter on its base: PEFT loads it, and every tensor is accounted for."""
