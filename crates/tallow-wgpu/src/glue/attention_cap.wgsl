// Scores before they are scaled, bent so that SCALE times them is CAP tanh(SCALE x / CAP): CAP_IN = SCALE / CAP, CAP_OUT =
// CAP / SCALE. And the slope of that where it gave y.
fn bent(x: f32) -> f32 { return CAP_OUT * tanh_of(x * CAP_IN); }
fn bent4(x: vec4<f32>) -> vec4<f32> { return vec4(bent(x.x), bent(x.y), bent(x.z), bent(x.w)); }
fn slope4(y: vec4<f32>) -> vec4<f32> { let t = y * CAP_IN; return vec4(1.0) - t * t; }
