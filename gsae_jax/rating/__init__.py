"""The paper's blinded study of features (section 4.3, Appendix H): pairs, answers, automatic raters, statistics."""
