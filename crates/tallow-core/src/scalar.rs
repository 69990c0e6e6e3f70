//! Scalar functions: the one table that elementwise fusion, the oracle and every renderer read.
//! Invariant: the third column is the meaning; it is evaluated in f64 by the oracle.
//! Absent on purpose: derivatives (one row each in `grad::map`) and device code that is not a template.

macro_rules! table {
    ($($(#[$doc:meta])* $V:ident, $n:literal, $name:literal, $eval:expr, $c:literal, $w:literal;)*) => {
        /// An elementwise function of one to three operands. A backend need not know them all: one it
        /// has no kernel for runs by [`ScalarOp::eval`].
        #[non_exhaustive]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ScalarOp { $($(#[$doc])* $V,)* }
        impl ScalarOp {
            /// Every scalar op, in table order.
            pub const ALL: &'static [ScalarOp] = &[$(ScalarOp::$V,)*];
            /// Number of operands.
            pub fn arity(self) -> usize { match self { $(Self::$V => $n,)* } }
            /// Lower-case name.
            pub fn name(self) -> &'static str { match self { $(Self::$V => $name,)* } }
            /// Reference meaning, in f64. `x` holds `arity` operands.
            pub fn eval(self, x: &[f64]) -> f64 { match self { $(Self::$V => { let f: fn(&[f64]) -> f64 = $eval; f(x) })* } }
            /// Does it want positive operands? Asked of the reference.
            pub fn wants_positive(self) -> bool { self.eval(&[-0.5; 3][..self.arity()]).is_nan() }
            /// Source template in `dialect`; `{0}`.. are the operands.
            pub fn template(self, dialect: Dialect) -> &'static str { match (self, dialect) { $((Self::$V, Dialect::C) => $c, (Self::$V, Dialect::Wgsl) => $w,)* } }
        }
    };
}

table! {
//  variant arity name     reference (f64)              C (CUDA)                WGSL
    /// `a + b`
    Add,     2, "add",     |x| x[0] + x[1],             "({0} + {1})",          "({0} + {1})";
    /// `a - b`
    Sub,     2, "sub",     |x| x[0] - x[1],             "({0} - {1})",          "({0} - {1})";
    /// `a * b`
    Mul,     2, "mul",     |x| x[0] * x[1],             "({0} * {1})",          "({0} * {1})";
    /// `a / b`
    Div,     2, "div",     |x| x[0] / x[1],             "({0} / {1})",          "({0} / {1})";
    /// The larger operand.
    Max,     2, "max",     |x| x[0].max(x[1]),          "fmaxf({0}, {1})",      "max({0}, {1})";
    /// The smaller operand.
    Min,     2, "min",     |x| x[0].min(x[1]),          "fminf({0}, {1})",      "min({0}, {1})";
    /// `a < b` as 1 or 0.
    Less,    2, "less",    |x| f64::from(x[0] < x[1]),  "({0} < {1} ? 1.f : 0.f)", "select(0.0, 1.0, {0} < {1})";
    /// `a == b` as 1 or 0.
    Equal,   2, "equal",   |x| f64::from(x[0] == x[1]), "({0} == {1} ? 1.f : 0.f)", "select(0.0, 1.0, {0} == {1})";
    /// `b` where `a` is not 0, else `c`. The operand not chosen does not matter, NaN included.
    Select,  3, "select",  |x| if x[0] != 0.0 { x[1] } else { x[2] }, "({0} != 0.f ? {1} : {2})", "select({2}, {1}, {0} != 0.0)";
    /// `-a`
    Neg,     1, "neg",     |x| -x[0],                   "(-{0})",               "(-{0})";
    /// `|a|`
    Abs,     1, "abs",     |x| x[0].abs(),              "fabsf({0})",           "abs({0})";
    /// `e^a`
    Exp,     1, "exp",     |x| x[0].exp(),              "expf({0})",            "exp({0})";
    /// Natural logarithm.
    Log,     1, "log",     |x| x[0].ln(),               "logf({0})",            "log({0})";
    /// Sine of radians.
    Sin,     1, "sin",     |x| x[0].sin(),              "sinf({0})",            "sin({0})";
    /// Cosine of radians.
    Cos,     1, "cos",     |x| x[0].cos(),              "cosf({0})",            "cos({0})";
    /// Hyperbolic tangent.
    Tanh,    1, "tanh",    |x| x[0].tanh(),             "tanhf({0})",           "tanh({0})";
    /// `1 / (1 + e^-a)`
    Sigmoid, 1, "sigmoid", |x| 1.0 / (1.0 + (-x[0]).exp()), "(1.f / (1.f + expf(-{0})))", "(1.0 / (1.0 + exp(-{0})))";
    /// Square root.
    Sqrt,    1, "sqrt",    |x| x[0].sqrt(),             "sqrtf({0})",           "sqrt({0})";
    /// `1 / sqrt(a)`
    Rsqrt,   1, "rsqrt",   |x| 1.0 / x[0].sqrt(),       "rsqrtf({0})",          "inverseSqrt({0})";
    /// `1 / a`
    Recip,   1, "recip",   |x| 1.0 / x[0],              "(1.0f / {0})",         "(1.0 / {0})";
    /// The largest whole number not above `a`.
    Floor,   1, "floor",   |x| x[0].floor(),            "floorf({0})",          "floor({0})";
}

/// Target language of [`ScalarProgram::render`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// CUDA C.
    C,
    /// WebGPU shading language.
    Wgsl,
}

/// One instruction of a fused elementwise body.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Inst {
    /// A constant, as f32 bits.
    Const(u32),
    /// A scalar function of earlier registers.
    Apply(ScalarOp, Vec<u16>),
}

/// A fused elementwise body in SSA form: registers `0..n_inputs` hold the loaded inputs;
/// instruction `i` writes register `n_inputs + i`; `outputs` names the registers to store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct ScalarProgram {
    /// Number of loaded operands.
    pub n_inputs: u16,
    /// The body.
    pub insts: Vec<Inst>,
    /// Registers stored, one for each output of the kernel.
    pub outputs: Vec<u16>,
}

impl ScalarProgram {
    /// Evaluates the body for one element; `regs` holds the inputs and receives every result.
    pub fn eval(&self, regs: &mut Vec<f64>) {
        for inst in &self.insts {
            let v = match inst {
                Inst::Const(bits) => f64::from(f32::from_bits(*bits)),
                Inst::Apply(op, args) => {
                    let mut x = [0.0; 3];
                    for (slot, a) in x.iter_mut().zip(args) {
                        *slot = regs[usize::from(*a)];
                    }
                    op.eval(&x[..op.arity()])
                }
            };
            regs.push(v);
        }
    }
    /// Number of arithmetic instructions, for cost models.
    pub fn flops(&self) -> usize {
        let apply = |i: &&Inst| matches!(i, Inst::Apply(..));
        self.insts.iter().filter(apply).count()
    }
    /// Body of the fused kernel in `dialect`; `r0..` are the loaded inputs.
    pub fn render(&self, dialect: Dialect) -> String {
        let decl = match dialect {
            Dialect::C => "const float",
            Dialect::Wgsl => "let",
        };
        let mut s = String::new();
        for (i, inst) in self.insts.iter().enumerate() {
            let r = usize::from(self.n_inputs) + i;
            let e = match (inst, dialect) {
                (Inst::Const(b), Dialect::C) => format!("{:?}f", f32::from_bits(*b)),
                (Inst::Const(b), Dialect::Wgsl) => format!("{:?}", f32::from_bits(*b)),
                (Inst::Apply(op, args), _) => args
                    .iter()
                    .enumerate()
                    .fold(op.template(dialect).to_string(), |t, (k, v)| {
                        t.replace(&format!("{{{k}}}"), &format!("r{v}"))
                    }),
            };
            s += &format!("{decl} r{r} = {e};\n");
        }
        s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_name_every_operand() {
        for op in ScalarOp::ALL {
            for d in [Dialect::C, Dialect::Wgsl] {
                for k in 0..op.arity() {
                    assert!(op.template(d).contains(&format!("{{{k}}}")), "{op:?} {d:?}");
                }
            }
        }
    }

    #[test]
    fn renders_to_both_dialects() {
        let p = ScalarProgram {
            n_inputs: 2,
            insts: vec![
                Inst::Apply(ScalarOp::Mul, vec![0, 1]),
                Inst::Const(1f32.to_bits()),
                Inst::Apply(ScalarOp::Add, vec![2, 3]),
            ],
            outputs: vec![4],
        };
        assert_eq!(
            p.render(Dialect::C),
            "const float r2 = (r0 * r1);\nconst float r3 = 1.0f;\nconst float r4 = (r2 + r3);\n"
        );
        assert_eq!(
            p.render(Dialect::Wgsl),
            "let r2 = (r0 * r1);\nlet r3 = 1.0;\nlet r4 = (r2 + r3);\n"
        );
    }
}
