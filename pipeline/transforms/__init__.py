"""How do raw images become model input? One specification, computed by DALI or by torch."""
