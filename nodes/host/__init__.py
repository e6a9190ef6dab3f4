"""Everything that touches the inside of ComfyUI. Checked with ComfyUI 0.24.1, 0.26.0 and 0.30.0."""
