"""Every source of drafts, alone and together, on recorded pairs or live."""
